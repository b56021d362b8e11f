"""The numbers of a run, shown also in the trackers that people already use: TensorBoard, trackio, Weights & Biases, MLflow.

``scalars.py`` says which numbers of a row are forwarded, ``trackers.py`` has one small class for each tracker, and
``forward.py`` brings every row to each of them once. Only this room touches their libraries, each when it is asked for.
"""

from fedbiscuit.tracking.forward import Tracking, open_tracking
from fedbiscuit.tracking.trackers import check_installed

__all__ = ["Tracking", "check_installed", "open_tracking"]
