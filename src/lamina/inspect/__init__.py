"""Before anything is trained: what a model is made of, what its clients hold, and what an experiment will send.

inspection(model, data)   ->  layer table, checks, bytes per method and codec
forecast(fed, rounds)     ->  bytes, seconds and memory of one experiment
within(config)            ->  the same experiment, set to keep within a budget of bytes
"""

from __future__ import annotations

from lamina.inspect.forecasts import Forecast, Range, forecast
from lamina.inspect.inspection import Inspection, inspection
from lamina.inspect.spending import Fitted, within

__all__ = ["Fitted", "Forecast", "Inspection", "Range", "forecast", "inspection", "within"]
