from .assertion import (
    NAME_PLACEHOLDER as NAME_PLACEHOLDER,
    Assertion as Assertion,
    CheckpointAssertion as CheckpointAssertion,
    ExternalAssertion as ExternalAssertion,
    MeasuredAssertion as MeasuredAssertion,
)
from .assertion_models import ASSERTIONS as ASSERTIONS
from .bounds import (
    DEFAULT as DEFAULT,
    SCHEME as SCHEME,
    SIDES as SIDES,
    Noise as Noise,
    Relative as Relative,
    Side as Side,
    Stated as Stated,
    Waiver as Waiver,
)
from .facts import (
    EMULATED as EMULATED,
    KERNELS as KERNELS,
    UNPACKED as UNPACKED,
    UNPROVED as UNPROVED,
    WEIGHTS_ONLY as WEIGHTS_ONLY,
    Anatomy as Anatomy,
    Gpu as Gpu,
    Machine as Machine,
    check_engine as check_engine,
    check_execution as check_execution,
    check_reference as check_reference,
    kind_patterns as kind_patterns,
    kinds_pattern as kinds_pattern,
)
from .fingerprint import (
    MOST_HASHED as MOST_HASHED,
    FileHashes as FileHashes,
    checkpoint_hashes as checkpoint_hashes,
    fingerprint_of as fingerprint_of,
    folders_of as folders_of,
    identified as identified,
    library_versions as library_versions,
    unhashed as unhashed,
    weight_files as weight_files,
    weight_order as weight_order,
    weights_hash as weights_hash,
)
from .inherit import read_suite as read_suite, suite_hash as suite_hash
from .load import (
    Suite as Suite,
    SuiteFile as SuiteFile,
    check_override as check_override,
    load_suite as load_suite,
    misfit as misfit,
    subject_of as subject_of,
    subject_on as subject_on,
    suite_schema as suite_schema,
)
from .paths import ALLOW_PATH as ALLOW_PATH, Boundary as Boundary, Roots as Roots
from .records import (
    PICTURES as PICTURES,
    SOUNDS as SOUNDS,
    file_records as file_records,
    media_column as media_column,
)
from .sections import (
    ANSWERED_AT_ONCE as ANSWERED_AT_ONCE,
    MEDIA as MEDIA,
    PROMPTS as PROMPTS,
    SELF as SELF,
    Data as Data,
    Engine as Engine,
    Floor as Floor,
    Generation as Generation,
    KvCache as KvCache,
    Memory as Memory,
    Model as Model,
    Served as Served,
    name_problem as name_problem,
    section_of as section_of,
)
from .session import Captures as Captures, MakeCapture as MakeCapture, OneTestError as OneTestError
from .subjects import (
    BUILTIN as BUILTIN,
    DOCUMENTS as DOCUMENTS,
    Checkpoint as Checkpoint,
    HubSet as HubSet,
    NamedSubject as NamedSubject,
    Subject as Subject,
    cache_folder as cache_folder,
    cached_snapshot as cached_snapshot,
    files_of as files_of,
    hub_set_of as hub_set_of,
    loaded_files as loaded_files,
    local_path as local_path,
    located as located,
    previous_of as previous_of,
)
from .texts import (
    SHIPPED as SHIPPED,
    Conversation as Conversation,
    conversation_of as conversation_of,
    long_document as long_document,
    prompts as prompts,
)
from .tiers import (
    DESELECTED as DESELECTED,
    NOT_RUN as NOT_RUN,
    OTHER_MODEL as OTHER_MODEL,
    REMARKS as REMARKS,
    TIERS as TIERS,
    WORKER_COLLECTED as WORKER_COLLECTED,
    WORKER_NOT_RUN as WORKER_NOT_RUN,
    WORKER_PROBLEM as WORKER_PROBLEM,
    WORKER_REMARKS as WORKER_REMARKS,
    Tier as Tier,
    split_by_tier as split_by_tier,
)
from .visualization import Visualization as Visualization
from .vllm import environment_of as environment_of, unfit_for_vllm as unfit_for_vllm
from .yaml_source import (
    Location as Location,
    Place as Place,
    YamlSource as YamlSource,
    disk_text as disk_text,
    suites_read_by as suites_read_by,
)
