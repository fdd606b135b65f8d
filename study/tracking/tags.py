"""Names of the tags that a study writes in MLflow: the one place that spells them.

A run of a part has PART and no TRIAL; a trial's run has both. The names are public: a person filters by them in MLflow's
UI, and views and reports read them back. Use it as a module, `tags.TRIAL`.
"""

from __future__ import annotations

PREFIX = "study."

# --- what a run is ----------------------------------------------------------------------------------------------------

PART = "study.part"
"""`search`, `sweep:<field>`, `ablate`, `score`, `data` or `report`."""
TRIAL = "study.trial"
"""`<part>/<cell>/<row>/<name>`, see `study.specs.Job.trial`."""
CELL = "study.cell"
"""`books->movies@0.2`."""
TASK = "study.task"
"""`books->movies`."""
RATIO = "study.ratio"
"""Of the cell, as text."""
ROW = "study.row"
"""Row of the plan: the subject's or a rival's name, or that of a simple baseline."""
MODEL = "study.model"
"""File in trainables/models, or `baseline`."""
PRESET = "study.preset"
"""Preset of the row, with the fields that its base sets over it: `ours`, `paper`, `paper+lr+steps`."""
VARIANT = "study.variant"
"""Value of a sweep, or name of an ablation."""

# --- what became of it ------------------------------------------------------------------------------------------------

SUPERSEDED = "study.superseded"
"""Why the plan does not ask for this run any more; without the tag the run counts."""
PRUNED = "study.pruned"
"""When and by which pruner the search stopped it."""
ERROR = "study.error"
"""One line: why it failed."""
FAILURE = "study.failure"
"""`trial`: the training raised or gave NaN; `worker`: its process went."""
RESTARTS = "study.restarts"
"""How often its process went, and why the last time."""
SPENT = "study.spent"
"""Seconds that it ran, all attempts without a result together."""
BEST = "study.best"
"""`true` on the best trial of each row and cell of a search."""
PLACE = "study.place"
"""Cell, and place in it: `books->movies@0.2 01` on the best row's winner, or on its scores; MLflow's UI sorts by it."""
PARETO = "study.pareto"
"""`true` on the trials of each row and cell that no other one beats in every objective."""
OBJECTIVES = "study.objectives"
"""On the run of a search: the metrics that are optimised together."""

# --- what it depends on -----------------------------------------------------------------------------------------------

FINGERPRINT = "study.fingerprint"
"""Hash of what the result depends on, see `study.engine.fingerprint`."""
DATA_KEY = "study.data_key"
FEATURE_KEY = "study.feature_key"
SIMULATED = "study.simulated"
"""`true` where a domain was made by the simulator."""
COMMIT = "study.commit"
VERSIONS = "study.versions"
DEVICE = "study.device"
"""What trained, see `study.provenance.device`."""
CPUS = "study.cpus"
GPUS = "study.gpus"

# --- how it is found and made again -----------------------------------------------------------------------------------

COMMAND = "study.command"
"""Trains it again."""
RUN = "study.run"
"""On a version of a registered model: the run that scored it."""
WRITE = "study.write"
"""Id under which a driver asked a server for this run, so that it is made once."""
STORE = "study.store"
PLAN = "study.plan"
DATA = "study.data"
CELLS = "study.cells"

# --- on the run of a report -------------------------------------------------------------------------------------------

DRAWN_FROM = "study.drawn_from"
"""Hash of all that the report shows."""
CLAIMS = "study.claims"
"""How many of the paper's claims hold."""

# --- MLflow's own -----------------------------------------------------------------------------------------------------

PARENT = "mlflow.parentRunId"
"""Run of the part that a trial belongs to."""
NOTE = "mlflow.note.content"
"""Description of an experiment."""
VIEW = "mlflow.sharedViewState."
"""Prefix of an experiment's saved views."""
EXPERIMENT_KIND = "mlflow.experimentKind"
"""Whether the UI opens the experiment on runs or on traces."""

# --- params -----------------------------------------------------------------------------------------------------------

NOT_CONFIG = frozenset({"row", "model", "task", "source", "target", "ratio", "seeds", "feature_set"})
"""Names of a trial's params that are no fields of its configuration."""
