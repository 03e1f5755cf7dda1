"""What all evaluations share."""

import numpy as np
import pytest

from sslvit.evaluation import protocol


@pytest.mark.parametrize(("right", "n"), [(520, 1000), (3, 20), (0, 10), (10, 10)])
def test_the_interval_is_that_of_resampling_the_test_images(right, n):
    """Against a bootstrap that draws images, not numbers."""
    correct = np.arange(n) < right
    generator = np.random.default_rng(1)
    means = [100 * correct[generator.integers(0, n, n)].mean() for _ in range(4000)]
    low, high = np.percentile(means, [2.5, 97.5])
    ours = protocol.interval(100 * right / n, n, seed=0)
    assert ours == pytest.approx((low, high), abs=0.35 if n == 1000 else 5)
    assert ours[0] <= 100 * right / n <= ours[1]
    assert ours == protocol.interval(100 * right / n, n, seed=0)
