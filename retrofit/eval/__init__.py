"""Numbers that people can check: certificate, acceptance, speed."""
