"""The small bilingual demo model: its corpus, its training script and its checkpoint (`demo/model`)."""
