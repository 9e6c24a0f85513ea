"""One run as one HTML file: counts (ledger), figures by round, a sample (traces, tokens), all together (collect), the page."""
