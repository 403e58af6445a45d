"""Reports: tables from pandas DataFrames; figures and the one self-contained HTML page need the extra `reports`."""

from hiplora.reporting.tables import formatted, interval, save_table
