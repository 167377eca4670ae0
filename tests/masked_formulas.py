"""The schedules and weights of masked diffusion as published, in any number of digits."""

import math

import mpmath

from snrweights.masked import CosineSchedule, LinearSchedule, PolynomialSchedule, list_masked_weightings

SCHEDULES = [LinearSchedule(), CosineSchedule(), PolynomialSchedule(), PolynomialSchedule(0.5), PolynomialSchedule(3.0)]
METHODS = list_masked_weightings()
INF = math.inf
# from the formulas as published, in the digits of a context of mpmath: the mask ratio, -alpha', and the weights of both
RATIO = {
    LinearSchedule: lambda m, t, p: t,
    CosineSchedule: lambda m, t, p: m.sin(m.pi * t / 2),
    PolynomialSchedule: lambda m, t, p: t**p,
}
FALL = {
    LinearSchedule: lambda m, t, p: m.mpf(1),
    CosineSchedule: lambda m, t, p: m.pi / 2 * m.sin(m.pi * (1 - t) / 2),
    PolynomialSchedule: lambda m, t, p: p * t ** (p - 1),
}


def log_odds(m, r):
    return m.log((1 - r) / r)


def normal(m, x, mean, deviation):
    return m.exp(-(((x - mean) / deviation) ** 2) / 2) / (deviation * m.sqrt(2 * m.pi))


def published_edm(m, log_snr):
    return normal(m, log_snr, m.mpf(12) / 5, m.mpf(12) / 5) * (m.exp(-log_snr) + m.mpf(1) / 4)


WEIGHTS = {
    "elbo": lambda m, r, fall: m.mpf(1),
    "simple": lambda m, r, fall: r / fall,
    "flow": lambda m, r, fall: m.sqrt(r / (1 - r)),
    "sigmoid": lambda m, r, fall: r / (1 - (1 - m.exp(-2)) * (1 - r)),  # bias 2
    "iddpm": lambda m, r, fall: 2 * m.sqrt(r * (1 - r)),
    "edm": lambda m, r, fall: published_edm(m, log_odds(m, r)),
}
HP = {"sigmoid": {"bias": 2.0}}
DIGITS = mpmath.mp.clone()
DIGITS.dps = 60


def published(t, schedule, method, m=DIGITS):
    """The mask ratio, -alpha' and w at one t."""
    t, power = m.mpf(t), m.mpf(getattr(schedule, "power", 1))
    r, fall = (formulas[type(schedule)](m, t, power) for formulas in (RATIO, FALL))
    return r, fall, WEIGHTS[method](m, r, fall)
