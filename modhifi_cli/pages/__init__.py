"""What people read of a run, a study, a comparison or an audit: pages, tables and figures, from plain values alone."""
