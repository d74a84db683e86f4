from .adapter import Adapter as Adapter
from .checks.cache_scales import CacheScale as CacheScale, scales_of_cache as scales_of_cache
from .checks.changed_settings import SETTING_LAYERS as SETTING_LAYERS, Resolved as Resolved
from .checks.health import (
    CHECKS as CHECKS,
    Check as Check,
    examine as examine,
    problems_of as problems_of,
    query_of_check as query_of_check,
)
from .checks.parts import (
    SEVERAL_TOKENS as SEVERAL_TOKENS,
    is_uncounted as is_uncounted,
    of_several_tokens as of_several_tokens,
)
from .checks.scales import FUSED_LAYERS as FUSED_LAYERS, WHOLE_SCALES as WHOLE_SCALES, misfits as misfits
from .checks.shards import unread_index as unread_index
from .experts import (
    EXPERT as EXPERT,
    PACKED as PACKED,
    ExpertLayer as ExpertLayer,
    expert_layers as expert_layers,
)
from .files import Files as Files
from .folder import (
    ADAPTER as ADAPTER,
    INDEX as INDEX,
    NUMBER as NUMBER,
    Finding as Finding,
    Folder as Folder,
    base_of as base_of,
    kind_of as kind_of,
    natural as natural,
    no_folder as no_folder,
    open_folder as open_folder,
    refusing_odd_settings as refusing_odd_settings,
)
from .formats.format import (
    Format as Format,
    format_of as format_of,
    libraries_of_formats as libraries_of_formats,
    streams_from_disk as streams_from_disk,
)
from .formats.gptq import AWQ_ORDER as AWQ_ORDER
from .formats.layer_tensors import SIGNS as SIGNS
from .formats.scheme import Declaration as Declaration, LayerScheme as LayerScheme, matches as matches
from .gguf_file import BlockTensor as BlockTensor
from .nearest import HEALTHY as HEALTHY, NEAREST as NEAREST, Requantization as Requantization
from .relation import Compare as Compare, Relation as Relation, compare_norms as compare_norms
from .side_files import (
    OF_A_LOAD as OF_A_LOAD,
    OF_A_TOKENIZER as OF_A_TOKENIZER,
    check_growth as check_growth,
    check_side_files as check_side_files,
    nested_settings as nested_settings,
    readable_tokenizer as readable_tokenizer,
)
from .smoothing_factors import Smoothing as Smoothing
from .suspicions import (
    Suspicion as Suspicion,
    by_kind as by_kind,
    counted_kinds as counted_kinds,
    suspicions_of as suspicions_of,
)
from .tensors import (
    FLOATS as FLOATS,
    Tensor as Tensor,
    decoded_rows as decoded_rows,
    element_count as element_count,
    encoded as encoded,
    layer_of as layer_of,
    metadata_of as metadata_of,
    scale_values as scale_values,
    spread_scales as spread_scales,
    tensors_of as tensors_of,
    unpacked as unpacked,
)
from .weights import (
    StoredWeight as StoredWeight,
    capture_weights as capture_weights,
    stored_weights as stored_weights,
    threads as threads,
    weight_names as weight_names,
)
