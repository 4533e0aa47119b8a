"""`report.html`: one page that holds everything it shows, drawn from `report.json` alone."""
