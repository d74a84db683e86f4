"""What the commands of `qsa` do beside gating: analyze, diff, calibrate, selftest, plan, draft."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
