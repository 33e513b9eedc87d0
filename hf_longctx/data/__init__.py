"""Floor 2: from data sets to the rows that every rank of a group reads together."""
