"""The report of one run or several: read from their folders, put into words, tables and charts."""
