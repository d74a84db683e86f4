from .analyze import Export as Export
from .calibrate import Sampled as Sampled
from .compare import Measurer as Measurer, Target as Target, distinct as distinct, size_of as size_of
from .diff.changes import compare_sides as compare_sides, parse_all as parse_all
from .diff.render import diff_lines as diff_lines, diff_markdown as diff_markdown, diff_page as diff_page
from .diff.sides import read_side as read_side
from .draft import first_suite as first_suite
from .explain_plan import gathered as gathered, plan_lines as plan_lines
from .history import Historian as Historian
from .ignore_lists import WRITERS as WRITERS, ignore_list as ignore_list, quantizer_of as quantizer_of
from .loosening import Loosening as Loosening, compared as compared, loosening_markdown as loosening_markdown
from .pictures import Analysis as Analysis, PatternError as PatternError, plan_pictures as plan_pictures
from .rank import (
    QuantizedUnits as QuantizedUnits,
    Ranking as Ranking,
    Unit as Unit,
    kept_lines as kept_lines,
    mean_of as mean_of,
    ranking_lines as ranking_lines,
    ranking_of as ranking_of,
)
from .revision import Revision as Revision
from .selftest.faults import FAULTS as FAULTS
from .selftest.run import (
    Selftest as Selftest,
    chosen as chosen,
    makes_a_pass as makes_a_pass,
    perplexity_suite as perplexity_suite,
    score_of as score_of,
)
from .selftest.table import lines_of as lines_of, score_line as score_line, write_outcomes as write_outcomes
from .suite_text import calibrated as calibrated
from .verification import Demands as Demands, verify as verify, write_statement as write_statement
