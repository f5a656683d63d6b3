"""vllm-depthpar: a vLLM plugin that serves checkpoints with restructured depth.

vLLM imports this package in every one of its processes, so importing it does nothing: no torch,
no vLLM, no logging set-up. The version is written here and nowhere else.
"""

__version__ = "0.1.0"
