from .api import capture as capture, capture_parts as capture_parts
from .formats.format import EngineFormat as EngineFormat, scheme_name as scheme_name
from .load.generation import Prompts as Prompts, why_no_answers as why_no_answers
from .load.models import Loaded as Loaded, load_model as load_model, loaded_from_fixture as loaded_from_fixture
from .load.outline import (
    anatomy as anatomy,
    layer_names as layer_names,
    outline as outline,
    outline_of as outline_of,
    this_machine as this_machine,
)
from .load.tokenizer import decoder_of as decoder_of, offered as offered
from .ranks import joined as joined
from .reference.predicted import answers_of as answers_of, tokenizer_at as tokenizer_at, windows as windows
from .reference.record import Recording as Recording, RecordOptions as RecordOptions
from .run.shared_pass import SampleShare as SampleShare
from .subject import (
    capture_loaded as capture_loaded,
    capture_subject as capture_subject,
    look_ahead as look_ahead,
    record_reference as record_reference,
)
from .substitution import Substitution as Substitution, substitution_of as substitution_of
from .threads import threads_restored as threads_restored
