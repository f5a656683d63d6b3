"""Starting and ending `vllm serve` and vLLM's engine, with a plan or plain."""
