"""The online few-shot learner: label generator, steepest descent, fusion."""
