"""What the process that runs of pytest are forked from has imported and made: a run takes 0.5 s of CPU instead of 6."""

# ruff: noqa: F401
import accelerate
import allure_pytest.plugin
import jinja2
import matplotlib.backends.backend_agg
import matplotlib.figure
import matplotlib.font_manager
import numpy as np
import PIL.PngImagePlugin
import psutil
import pytest_html.plugin
import pytest_metadata.plugin
import pytest_randomly
import pytest_rerunfailures
import safetensors.numpy
import syrupy
import torch
import transformers.models.auto.modeling_auto
import transformers.models.auto.tokenization_auto
import transformers.models.llama.modeling_llama
import transformers.tokenization_utils_tokenizers
import xdist.looponfail
import xdist.plugin

import pytest_qsa.engine.api
import pytest_qsa.engine.subject
import pytest_qsa.gate.assertions
import pytest_qsa.gate.gate
import pytest_qsa.gate.reporting
import pytest_qsa.gate.summary
import pytest_qsa.report.page
import pytest_qsa.report.plots.figures
import pytest_qsa.report.verdict_text
import pytest_qsa.suite.load
import pytest_qsa.verdicts.baselines
from pytest_qsa.engine.reduce import cpu, cpu_kernels as kernels

# What is made at its first use: the schema of suites, the page's templates.
pytest_qsa.suite.load.Suite.model_rebuild()
pytest_qsa.report.page.render_page([], {"command": "", "started": "", "duration_s": 0.0, "counts": {}, "version": ""})
# A first kernel makes numba ready, without its threads, which no fork would have.
kernels.extremes32(*(np.zeros(1, np.uint32) for _ in range(3)))
