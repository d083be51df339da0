#define PGOLF_ISA baseline
#include "softcap_ce/rows.h"
