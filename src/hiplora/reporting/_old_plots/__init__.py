"""What a report shows: each module turns a part of the results into plates, drawn by `reporting.canvas`."""
