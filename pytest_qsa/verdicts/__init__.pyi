from .baseline_file import BaselineFile as BaselineFile, is_baseline as is_baseline
from .baselines import (
    HOME as HOME,
    NAME as NAME,
    QsaBaselineExtension as QsaBaselineExtension,
    baseline_folder as baseline_folder,
    judge_against_baseline as judge_against_baseline,
    name_for_class as name_for_class,
)
from .beside import beside_reference as beside_reference, provenance_of as provenance_of
from .budgets import Budget as Budget, budget_of as budget_of, key_of as key_of
from .evidence import (
    channel_of as channel_of,
    context as context,
    sinks_behind as sinks_behind,
    token_evidence as token_evidence,
)
from .explain import diagnosed as diagnosed
from .external import judge_scores as judge_scores
from .judge import measured as measured
from .previous import kept_release as kept_release, previous_values as previous_values
from .ratchet import (
    SPARE as SPARE,
    limits_of as limits_of,
    outward as outward,
    patch_of as patch_of,
    project_root as project_root,
)
from .served import settled as settled
from .static import judge_problems as judge_problems
from .verdict import (
    Kind as Kind,
    Row as Row,
    TokenEvidence as TokenEvidence,
    Tolerance as Tolerance,
    Verdict as Verdict,
    anomaly as anomaly,
    detailed as detailed,
    judge_bounds as judge_bounds,
    softened as softened,
)
from .waivers import apply_waivers as apply_waivers, joint_uses as joint_uses
