from .analyze.pictures import Analysis as Analysis, PatternError as PatternError, plan_pictures as plan_pictures
from .analyze.write import write_analysis as write_analysis
from .calibrate.edit import calibrated as calibrated
from .calibrate.measure import Finding as Finding, Proposal as Proposal, Sampled as Sampled
from .diff.changes import compare as compare
from .diff.conditions import parse_all as parse_all
from .diff.render import diff_text as diff_text, markdown_of as markdown_of, page_of as page_of
from .diff.sides import read_side as read_side
from .draft import (
    COMPARED as COMPARED,
    FILES as FILES,
    UNQUANTIZED as UNQUANTIZED,
    Draft as Draft,
    draft_text as draft_text,
    measured_drafts as measured_drafts,
    sinks_of as sinks_of,
)
from .plan.explain_plan import plan_lines as plan_lines
from .plan.gather import gathered as gathered
from .selftest.faults import FAULTS as FAULTS
from .selftest.perplexity import makes_a_pass as makes_a_pass, suite_beside as suite_beside
from .selftest.run import Selftest as Selftest, chosen as chosen, score_of as score_of
from .selftest.table import lines_of as lines_of, score_line as score_line, write_outcomes as write_outcomes
