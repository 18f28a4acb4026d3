"""What `plan` and `inspect` tell, as text, JSON or a page."""
