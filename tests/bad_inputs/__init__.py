"""What users get wrong, as tables: a file for each area, and what each input must be answered with."""
