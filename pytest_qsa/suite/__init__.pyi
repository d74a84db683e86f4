from .anatomy import Anatomy as Anatomy
from .assertion import Assertion as Assertion
from .bounds import DEFAULT as DEFAULT, SCHEME as SCHEME, Relative as Relative, Stated as Stated
from .datasets import (
    BUILTIN as BUILTIN,
    DOCUMENTS as DOCUMENTS,
    HubSet as HubSet,
    cache_folder as cache_folder,
    hub_set_of as hub_set_of,
    local_path as local_path,
)
from .execution import (
    EMULATED as EMULATED,
    KERNELS as KERNELS,
    UNPACKED as UNPACKED,
    UNPROVED as UNPROVED,
    WEIGHTS_ONLY as WEIGHTS_ONLY,
    check_execution as check_execution,
    executed_as as executed_as,
)
from .external_assertion import NAME as NAME, ExternalAssertion as ExternalAssertion
from .fields import section_of as section_of
from .fingerprint import (
    FileHashes as FileHashes,
    fingerprint_of as fingerprint_of,
    identified as identified,
    local_folder as local_folder,
    weight_files as weight_files,
)
from .inherit import read_suite as read_suite
from .load import (
    SuiteFile as SuiteFile,
    check_override as check_override,
    load_suite as load_suite,
    make_suite as make_suite,
    misfit as misfit,
)
from .machine import Gpu as Gpu, Machine as Machine
from .noise import SIDES as SIDES, Noise as Noise, Side as Side
from .schema import suite_schema as suite_schema
from .sections import (
    CheckpointAssertion as CheckpointAssertion,
    Data as Data,
    MeasuredAssertion as MeasuredAssertion,
    Memory as Memory,
    Model as Model,
    Suite as Suite,
)
from .served_model import Floor as Floor, Served as Served
from .session import Captures as Captures, MakeCapture as MakeCapture
from .subject import (
    Checkpoint as Checkpoint,
    Subject as Subject,
    files_of as files_of,
    is_kept as is_kept,
    kept_reference as kept_reference,
    located as located,
    previous_of as previous_of,
    reference_of as reference_of,
    stored_quantized as stored_quantized,
)
from .tiers import (
    NOT_RUN as NOT_RUN,
    TIERS as TIERS,
    WORKER_NOT_RUN as WORKER_NOT_RUN,
    WORKER_PROBLEM as WORKER_PROBLEM,
    Tier as Tier,
    split_by_tier as split_by_tier,
)
from .visualization import Visualization as Visualization
from .waiver import Waiver as Waiver
from .yaml_source import Location as Location, Place as Place, YamlSource as YamlSource
