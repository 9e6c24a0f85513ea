"""One run as one HTML file: counts (ledger), figures by round, a sample of traces (traces, tokens), the document, the page."""
