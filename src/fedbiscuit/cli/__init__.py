"""The commands. Each reads its settings and calls one function of pipeline, report, data, deployment or station.

``entry.py`` is the way in and the ways out. Behind it: ``stages.py`` (run and what it is made of), ``results.py``,
``inputs.py``, ``federation.py`` and ``station.py``; what they have in common is in ``shared.py``.
Nothing heavy is imported before a command needs it: ``--help``, ``config`` and ``data check`` load no torch.
"""

# Each file adds its commands to the program, and in this order an unknown command's error names them.
from fedbiscuit.cli import stages, results, inputs, federation, station  # noqa: F401  # isort: skip
from fedbiscuit.cli.entry import main
from fedbiscuit.cli.shared import app

__all__ = ["app", "main"]
