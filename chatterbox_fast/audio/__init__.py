"""Waveforms: from one sampling rate to another."""

from .resample import Resample, resample

__all__ = ["Resample", "resample"]
