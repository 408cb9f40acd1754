from __future__ import annotations

import pytest

from sparkdeep.errors import ConfigError
from sparkdeep.spark.session.placement import resolve_device


@pytest.mark.parametrize(
    ("setting", "addresses", "visible", "device"),
    [
        ("auto", [], None, "cpu"),
        ("auto", ["1"], None, "cuda:1"),
        ("auto", [" 1 "], "", "cuda:1"),
        ("auto", ["3"], "2,3", "cuda:1"),
        ("auto", ["0"], "1,0", "cuda:1"),
        ("auto", ["GPU-b"], "GPU-a, GPU-b", "cuda:1"),
        ("auto", ["1"], "GPU-a,GPU-b", "cuda:1"),
        ("cpu", ["1"], None, "cpu"),
        ("cuda:5", [], "0", "cuda:5"),
    ],
)
@pytest.mark.fault(rows=[35], phases="TR")
def test_the_gpu_that_spark_gave_is_found_among_the_visible_ones(setting, addresses, visible, device):
    assert resolve_device(setting, addresses, visible) == device


@pytest.mark.parametrize(
    ("addresses", "visible", "message"),
    [
        (["0", "1"], None, r"2 GPUs \(0, 1\).*one\. Set gpus_per_worker=1"),
        (["GPU-a"], None, r"'GPU-a', which is no number; set CUDA_VISIBLE_DEVICES"),
        (["2"], "0,1", r"'2', but CUDA_VISIBLE_DEVICES='0,1' does not list it\. Let the discovery script"),
        (["2"], "GPU-a,GPU-b", r"'2', but CUDA_VISIBLE_DEVICES='GPU-a,GPU-b' does not list it"),
    ],
)
@pytest.mark.fault(rows=[35], phases="PF")
def test_a_gpu_that_cannot_be_found_is_refused_with_what_to_set(addresses, visible, message):
    with pytest.raises(ConfigError, match=message):
        resolve_device("auto", addresses, visible)
