"""Numbers against numbers: errors, budgets and rates. Imports torch alone."""
