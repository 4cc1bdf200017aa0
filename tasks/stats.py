"""Intervals by resampling: how far a mean may be from what other patients or images would give."""

import numpy as np


def draw_counts(count, resamples=1000, seed=0):
    """How often each of `count` groups is in a resample of them, (count,), once for each of the resamples."""
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.bincount(generator.integers(count, size=count), minlength=count)


def resampled_sums(values, groups, resamples=1000, seed=0):
    """
    Sums of (n, K) numbers over each resample of their groups, (resamples, K) float64.

    groups: (n,) the image or patient of each row. Groups are drawn, not rows: what is asked about one image,
    and what one patient's images show, is right or wrong together, and intervals that overlook it are too
    narrow. Whoever wants an interval makes the score of each resample of its sums.
    """
    _, groups = np.unique(groups, return_inverse=True)
    count = groups.max() + 1
    sums = np.zeros((count, values.shape[1]))
    np.add.at(sums, groups, values)
    return np.stack([counts @ sums for counts in draw_counts(count, resamples, seed)])


def bootstrap(values, groups, resamples=1000, seed=0):
    """
    Means over resampled questions, (resamples, K), of (n, K) values, nan where one does not apply; groups as in
    resampled_sums. A mean is nan where a resample holds no question that the value applies to.
    """
    there = ~np.isnan(values)
    sums = resampled_sums(np.hstack([np.nan_to_num(values), there]), groups, resamples, seed)
    totals, counts = np.hsplit(sums, 2)
    with np.errstate(invalid="ignore"):  # a resample may hold no closed question at all
        return totals / counts


def intervals(values, groups, seed=0):
    """
    (mean, low, high) of each of K columns, (K, 3), with 95% intervals, and the share of the resamples
    that hold no question of the column, (K,). values: (n, K), nan where one does not apply; groups:
    (n,). A column without any value is nan. So are the bounds where all values are of one group: it
    says nothing about others.
    """
    there = ~np.isnan(values)
    cells = np.full((values.shape[1], 3), np.nan)
    drawn = bootstrap(values, groups, seed=seed)
    for column, some in enumerate(there.T):
        if not some.any():
            continue
        cells[column, 0] = np.nansum(values[:, column], axis=0) / some.sum()
        if len(np.unique(np.asarray(groups)[some])) > 1:
            cells[column, 1:] = np.nanpercentile(drawn[:, column], (2.5, 97.5))
    return cells, np.isnan(drawn).mean(axis=0)


def draw_units(images, patients):
    """
    What a bootstrap is to draw, "images", "patients" or "patients or images", and the number of each
    question's, (n,).

    images: (n,) the same number, not negative, for questions about the same images. patients: n names, ""
    where none is known. A patient's images are right or wrong together.
    """
    first = images.max(initial=-1) + 1  # the patients' numbers come behind the images'
    numbers = {name: first + number for number, name in enumerate(dict.fromkeys(patients))}
    units = np.where([bool(name) for name in patients], [numbers[name] for name in patients], images)
    unit = "images" if not any(patients) else "patients" if all(patients) else "patients or images"
    return unit, units
