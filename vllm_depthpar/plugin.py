"""vLLM's entry point into this package (group `vllm.general_plugins`)."""


def register() -> None:
    """Register the plugin. vLLM calls this in every one of its processes, perhaps repeatedly.

    Raises:
        UserError: this vLLM is not one that the package was checked on.
    """
    from vllm.version import __version__ as vllm_version

    from vllm_depthpar import vllm_compat

    vllm_compat.check_version(vllm_version)
    vllm_compat.install()
