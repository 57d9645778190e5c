"""A toy data set in English and Arabic: questions, good and bad answers, and the rule that tells them apart."""
