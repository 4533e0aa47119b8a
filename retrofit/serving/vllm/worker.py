"""The worker of a server of an artifact: vLLM's own of the platform, whose proposer gets to know the model runner."""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


class Worker(PlatformWorker):
    """For `--worker-cls`."""

    def load_model(self, **options: Any) -> None:
        super().load_model(**options)
        self.model_runner.drafter.attach(self.model_runner)
