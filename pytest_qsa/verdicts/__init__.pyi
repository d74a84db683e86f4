from .baseline_file import (
    BASELINES as BASELINES,
    EDITED as EDITED,
    BaselineFile as BaselineFile,
    Tolerance as Tolerance,
    baseline_folder as baseline_folder,
    baseline_hashes as baseline_hashes,
    is_baseline as is_baseline,
    read_baseline as read_baseline,
)
from .baselines import (
    BASELINE_FOLDER as BASELINE_FOLDER,
    BASELINE_NAME as BASELINE_NAME,
    QsaBaselineExtension as QsaBaselineExtension,
    judge_against_baseline as judge_against_baseline,
    name_for_class as name_for_class,
)
from .budgets import (
    SPARE as SPARE,
    Budget as Budget,
    key_of as key_of,
    outward as outward,
    patch_of as patch_of,
    project_root as project_root,
    stated_text as stated_text,
)
from .explainers import Context as Context, explain as explain
from .judge import (
    Evidence as Evidence,
    Identity as Identity,
    Measurement as Measurement,
    Release as Release,
    concluded as concluded,
    foresee as foresee,
    judge_assertion as judge_assertion,
    judge_problems as judge_problems,
    kept_release as kept_release,
    stopped as stopped,
)
from .judgement import (
    NO_LENIENCY as NO_LENIENCY,
    Judgement as Judgement,
    Leniency as Leniency,
    checked_series as checked_series,
    positions_needed as positions_needed,
    unbounded as unbounded,
    within_budget as within_budget,
)
from .tokens import channel_of as channel_of, context as context
from .verdict import Kind as Kind, Row as Row, TokenEvidence as TokenEvidence, Verdict as Verdict
