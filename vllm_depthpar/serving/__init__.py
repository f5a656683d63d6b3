"""What the plugin adds to vLLM's server: metrics, and two endpoints."""
