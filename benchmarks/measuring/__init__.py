"""What every benchmark measures with: rows, tables, plots, processes and where they ran."""
