"""One run as one HTML file: counts (ledger), figures by round, a sample of traces (traces, tokens), and the page itself."""
