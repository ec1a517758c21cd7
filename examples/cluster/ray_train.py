"""One tuning on the workers of a Ray cluster: python examples/cluster/ray_train.py [--workers N] [--gpus]

Ray Train (pip install 'luthier[ray]') places the workers and forms their group; each then makes the same call, and the
first of them writes the run. LUTHIER_RUNS must be a directory that all workers see.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

SETTINGS = {"model": "mini", "data": {"train": "sms_spam", "limit": 600}, "objective": "classify", "baselines": False}


def learn(settings: dict[str, Any]) -> None:
    """What each worker does."""
    import ray.train

    import luthier

    os.environ["LUTHIER_RUNS"] = settings.pop("runs")
    record = luthier.tune(**settings)
    metrics = {name: estimate.value for name, estimate in record.metrics.items()}
    ray.train.report({"run": record.id, **metrics})


def main() -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", action="store_true", help="one GPU a worker")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--sharding", choices=("none", "full"), default="none")
    parser.add_argument("--name", default=None)
    found = parser.parse_args()
    runs = str(Path(os.environ.get("LUTHIER_RUNS", "runs")).absolute())
    more = {"steps": found.steps, "sharding": found.sharding, "name": found.name, "runs": runs}
    trainer = TorchTrainer(
        learn,
        train_loop_config={**SETTINGS, **more},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if found.gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=found.workers, use_gpu=found.gpus),
        run_config=RunConfig(storage_path=str(Path(runs) / ".ray"), name="luthier"),
    )
    trainer.fit()
    print(f"The run is in {runs}.")


if __name__ == "__main__":
    main()
