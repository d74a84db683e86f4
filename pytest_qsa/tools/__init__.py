"""What the commands of `qsa` do beside gating: analyze, diff, calibrate, selftest, plan, draft."""

from ..common import face

__getattr__, __dir__ = face(__name__, __file__)
