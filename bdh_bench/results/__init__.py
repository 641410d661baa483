"""The reading half: stored runs → tables → statistics → claims → figures → report. No torch here, and no effects."""
