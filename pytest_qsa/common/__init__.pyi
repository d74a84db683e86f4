from .checksums import (
    BLANK as BLANK,
    NO_CHECKSUM as NO_CHECKSUM,
    check_checksum as check_checksum,
    checked_json as checked_json,
    content_hash as content_hash,
    json_with_checksum as json_with_checksum,
    parts_with_checksum as parts_with_checksum,
    with_checksum as with_checksum,
)
from .collector import (
    earlier_objects_frozen as earlier_objects_frozen,
    libraries_frozen as libraries_frozen,
    uncollected as uncollected,
)
from .cores import BACKGROUND as BACKGROUND, own_cores as own_cores
from .errors import (
    AnomalyError as AnomalyError,
    BaselineError as BaselineError,
    InfraError as InfraError,
    QsaError as QsaError,
    QsaUnplannedCaptureWarning as QsaUnplannedCaptureWarning,
    QsaWarning as QsaWarning,
    SuiteError as SuiteError,
    ToldError as ToldError,
    UnloadableFormatError as UnloadableFormatError,
    did_you_mean as did_you_mean,
    one_line as one_line,
    remark as remark,
    scrubbed as scrubbed,
    shown_path as shown_path,
)
from .extensions import Registry as Registry
from .files import (
    MOST_TEXT as MOST_TEXT,
    Scratch as Scratch,
    mistaken_for as mistaken_for,
    parsed_json as parsed_json,
    read_json as read_json,
    refuse_sparse as refuse_sparse,
    refuse_special as refuse_special,
    remove_unfinished as remove_unfinished,
    write_atomically as write_atomically,
)
from .imports import Room as Room, face as face
from .locks import (
    LOCK_TIMEOUT as LOCK_TIMEOUT,
    Patience as Patience,
    locked as locked,
)
from .permissions import (
    VllmProgram as VllmProgram,
    VllmWords as VllmWords,
    allowed_code as allowed_code,
    allowed_paths as allowed_paths,
    vllm_arguments as vllm_arguments,
    vllm_program as vllm_program,
)
from .progress import (
    Progress as Progress,
    Status as Status,
    lasting_stderr as lasting_stderr,
    phase as phase,
    shown_time as shown_time,
    status as status,
    step as step,
)
from .text import (
    code_span as code_span,
    counted as counted,
    escaped as escaped,
    fitted as fitted,
    for_terminal as for_terminal,
    html_table as html_table,
    logger as logger,
    markdown_table as markdown_table,
    number as number,
    short_hash as short_hash,
    shows_colours as shows_colours,
    size_text as size_text,
    text_table as text_table,
    visible as visible,
)
