// test_align.cu: test_align.c for train_qwen.cu.
#define QWEN_NO_MAIN
#include "../../train_qwen.cu"
#include "test_align.c"
