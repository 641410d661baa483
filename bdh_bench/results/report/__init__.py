"""The page: figures drawn twice (plotly for hands, SVG for print), one HTML file that opens from disk."""
