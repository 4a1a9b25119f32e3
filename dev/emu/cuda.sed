# The part of CUDA C++ that is no C++ -> plain C++. Use: sed -E -z -f cuda.sed in.cu > out.cpp; every line stays on its line.
# Launch: kernel<T><<<grid, block, ...>>>(args) -> EMU_LAUNCH((kernel<T>), grid, block, ...)(args). \x01 and \x02 stand for <<< and >>>
# meanwhile, so that only a pair with neither in between is taken: the >>> that closes vector<vector<vector<int>>> stays.
s/<<</\x01/g
s/>>>/\x02/g
s/([A-Za-z_][A-Za-z0-9_:]*(<[^<>;{}\x01\x02]*(<[^<>;{}\x01\x02]*>[^<>;{}\x01\x02]*)*>)?)[ \n]*\x01([^\x01\x02]*)\x02/EMU_LAUNCH((\1), \4)/g
s/\x01/<<</g
s/\x02/>>>/g
# Dynamic shared memory: extern __shared__ T name[]; -> T *name = ...;
s/extern[ ]+(__align__\([^)]*\)[ ]*)?__shared__[ ]+((__align__|alignas)\([^)]*\))?[ ]*([^;\n]*[^; \n])[ ]+([A-Za-z_][A-Za-z0-9_]*)[ ]*\[[ ]*\][ ]*;/\4 *\5 = (\4 *)emu::dynamic_shared();/g
# Static shared memory: first one declarator per statement, then __shared__ T name[N]; -> a reference to guarded memory of the block.
:split
s/(__shared__[ ]+[^][;=,\n]*[^][;=,\n ])([ ]+[A-Za-z_][A-Za-z0-9_]*(\[[^];\n]*\])*)[ ]*,[ ]*([A-Za-z_][A-Za-z0-9_]*(\[[^];\n]*\])*[ ]*[,;])/\1\2; \1 \4/g
t split
s/(static[ ]+)?__shared__[ ]+((__align__|alignas)\([^)]*\))?[ ]*([^][;=\n(),]*[^][;=\n(), ])[ ]+([A-Za-z_][A-Za-z0-9_]*)[ ]*((\[[^];\n]*\][ ]*)*);/static EMU_PER_THREAD emu::Shared<\4 \6> \5_shared; auto \&\5 = \5_shared.get("\5");/g
