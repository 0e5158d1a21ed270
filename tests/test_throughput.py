"""Lines about the speed of a run: work of all hosts, over time that is counted once."""

import time

import pytest

from hebasr_jax import throughput
from hebasr_jax.throughput import Window, Work


def test_time_that_hosts_wait_for_each_other_is_counted_once(monkeypatch) -> None:
    """Waiting in the gather fell in no window: rates were too high, and waits above 100 %."""
    late_s, clock = 0.2, time.perf_counter()

    def gather(own: list) -> list:
        time.sleep(late_s)  # for the other host, which read its data all the time
        sums, _, peak = own
        return [own, [sums, 0.9, (peak or 0) + 7]]

    monkeypatch.setattr(throughput, "from_all_hosts", gather)
    window, lines = Window(devices=2), []
    for step in range(3):
        window.work.append(Work(5.0, 100, 200, 30, 40, 1e12))
        window.losses.append(1.0)
        lines.append(window.line(step, 3, 0.0, {}))
    passed_s = time.perf_counter() - clock
    told_s = sum(10.0 / line["audio_s_per_s"] for line in lines)
    assert told_s == pytest.approx(passed_s - late_s, abs=0.05)  # the last gather is of the next
    for line in lines:
        assert line["data_wait_share"] == 0.9
        assert line["padding_audio"] == 0.5
        assert line["memory_bytes"] >= 7
        assert line["tflops"] == pytest.approx(line["audio_s_per_s"] / 10)
