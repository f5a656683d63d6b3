"""vLLM's own two nodes of one rank each, on this machine: what all their servers are told."""

from vllm_depthpar.launch.server import free_port

ENV = {
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
}
# What the node of each rank is told besides.
ROLES: tuple[list[str], ...] = (["--node-rank", "0"], ["--node-rank", "1", "--headless"])


def options() -> list[str]:
    """Flags of ``vllm serve`` for both; a new port each time."""
    return [
        *("--tensor-parallel-size", "2", "--distributed-executor-backend", "mp", "--nnodes", "2"),
        *("--master-addr", "127.0.0.1", "--master-port", str(free_port())),
    ]
