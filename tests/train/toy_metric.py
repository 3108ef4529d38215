"""The config of `test_objectives.py`: a run with one more metric."""

from clu.metrics import Average
from ml_collections import ConfigDict

from tests import trainer


def get_config() -> ConfigDict:
    from spectral_pod.data.tasks.listops import ListOps

    metrics = ListOps.objective.evaluation_metrics
    metrics["squared_loss"] = Average.from_fun(lambda loss, **_: loss**2)
    c = trainer.get_config()
    c.train.total_steps = c.train.eval_every_steps = 2
    return c
