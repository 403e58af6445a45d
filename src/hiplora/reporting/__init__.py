"""Reports: tables and figures from pandas DataFrames, and one self-contained HTML page that holds them."""

from hiplora.extras import require

require("reports")

from hiplora.reporting import plots
from hiplora.reporting.html import Section, save_page
from hiplora.reporting.plots import save_figure
from hiplora.reporting.tables import formatted, interval, save_table
