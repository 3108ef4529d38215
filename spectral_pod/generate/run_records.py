"""What the records of a run say beside its configuration and parameters, for the model card."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from spectral_pod import project_files, storage
from spectral_pod.config import Config, store_and_weight
from spectral_pod.data import byte_store, tasks
from spectral_pod.data.byte_store import ByteStore
from spectral_pod.data.tasks import StoredTask
from spectral_pod.errors import UserError
from spectral_pod.project_files import Manifest, Result, Start
from spectral_pod.train.sources import digest_of


class Footprint(NamedTuple):
    """What training took up to a step.

    Attributes:
      devices: of every start until then, each as (first step, "8 TPU v4", number of processes).
      seconds: in which the processes of these starts ran, evaluations and compiling included.
      step_seconds: those of them that went into training steps.
      device_seconds: `seconds` of each start times the number of its devices.
      restart_seconds: between the last record of a start and the next start. The processes ran for
        an unknown part of it, in which they took steps that were lost.
    """

    devices: list[tuple[int, str, int]]
    seconds: float
    step_seconds: float
    device_seconds: float
    restart_seconds: float


class RunRecords(NamedTuple):
    """The records of a run; all are empty where nothing is recorded.

    Attributes:
      result: of its end; None before it.
      starts: the lines of `starts.jsonl`.
      metrics: the lines of `metrics.jsonl`.
      stores: the manifests of the data it was trained on, by name; none of data that are drawn.
      no_stores: why `stores` is empty although the data are stored.
    """

    result: Result | None = None
    starts: Sequence[Start] = ()
    metrics: Sequence[Mapping[str, float]] = ()
    stores: Mapping[str, Manifest] = {}
    no_stores: str = "its records are not known"

    def figures(self, step: int) -> dict[str, dict[str, float]]:
        """The finite metrics at a step on data that were held out, by split and name."""
        result = self.result_of(step)
        last = [result["eval"]["split"]] if result else []
        splits: dict[str, dict[str, float]] = {split: {} for split in ("validation", *last)}
        for line in self.metrics:
            for tag, value in line.items() if line["step"] == step else ():
                split, _, name = tag.partition("/")
                if split in splits and math.isfinite(value):
                    splits[split][name] = value
        if result:
            evaluation: Mapping[str, Any] = result["eval"]
            splits[last[0]] |= {name: x for name, x in evaluation.items() if _is_number(x)}
        return {split: values for split, values in splits.items() if values}

    def result_of(self, step: int) -> Result | None:
        """The result, if it is of this step."""
        return self.result if self.result is not None and self.result["step"] == step else None

    def footprint(self, step: int) -> Footprint | None:
        """What training took up to a step; None if the records do not say."""
        lines = [
            line
            for line in self.metrics
            if line["step"] <= step and {"wall_time", "goodput/step_seconds"} <= line.keys()
        ]
        starts = [start for start in self.starts if start["step"] < step]
        num_devices = [_num_devices(start) for start in starts]
        if not (lines and starts and all(num_devices)):
            return None
        # Lines have sums since the first start. What is added is of the start that wrote the line.
        seconds = device_seconds = 0.0
        for line in lines:
            before, seconds = seconds, _seconds_running(line)
            writer = sum(start["wall_time"] <= line["wall_time"] for start in starts) - 1
            device_seconds += (seconds - before) * num_devices[max(writer, 0)]
        return Footprint(
            [(start["step"], start["devices"], start["processes"]) for start in starts],
            seconds,
            lines[-1]["goodput/step_seconds"],
            device_seconds,
            lines[-1].get("goodput/restart_seconds", 0.0),
        )


NO_RECORDS = RunRecords()


def read(workdir: str, config: Config, data_digest: str) -> RunRecords:
    """The records of the run in a workdir, and the manifests of its data where they still are.

    Args:
      workdir: a folder or a gs:// URL.
      config: that of the run.
      data_digest: of the data of the run.

    Raises:
      DataError: the result is damaged. Damaged lines of logs are left out.
    """
    folder = epath.Path(workdir)
    file = folder / "result.json"
    stores, no_stores = _stores(config, data_digest)
    return RunRecords(
        project_files.RESULT.read(file) if file.exists() else None,
        project_files.Log(folder / "starts.jsonl", project_files.START).lines,
        project_files.Log(folder / "metrics.jsonl", project_files.METRICS).lines,
        stores,
        no_stores,
    )


def _stores(config: Config, data_digest: str) -> tuple[dict[str, Manifest], str]:
    """The manifests of the stores of a run by name, and why there are none."""
    task = tasks.make(config.data.task, config.data.options)
    if not isinstance(task, StoredTask):
        return {}, ""
    stores: dict[str, ByteStore] = {}
    entries = [store_and_weight(entry) for entry in config.data.stores]
    try:
        if not entries:
            storage.check_access(task.store_path(config.data.dir), write=False)
            options = config.data.options.to_dict()
            entries = [(task.find_store(config.data.dir, options), 1.0)]
        for path, _ in entries:
            path = storage.place(path, "config.data.stores")
            name = path.rpartition("/")[2]  # not where it is, which is nobody else's concern
            storage.check_access(path, write=False)
            if not byte_store.exists(path):
                return {}, f"{name} was not there when this card was written"
            stores[name] = ByteStore(path)
    except UserError as error:
        return {}, f"they could not be read when this card was written ({error})"
    if data_digest != digest_of(stores, [float(weight) for _, weight in entries]):
        return {}, "what is in their place now is not what the run was trained on"
    return {name: store.manifest for name, store in stores.items()}, ""


def _seconds_running(line: Mapping[str, float]) -> float:
    """The seconds of all phases (`train/goodput.py`) but those between a start and the next."""
    return sum(
        seconds
        for name, seconds in line.items()
        if name.startswith("goodput/")
        and name.endswith("_seconds")
        and name != "goodput/restart_seconds"
    )


def _num_devices(start: Start) -> int:
    """The number that begins "8 TPU v4"; 0 if there is none."""
    number, _, _ = start["devices"].partition(" ")
    return int(number) if re.fullmatch("[0-9]{1,9}", number) else 0


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and abs(x) < 1e300
